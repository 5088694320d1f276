"""What a run sends, holds and chose.

bytes on the wire, predicted and compiled: `ledger`. an all-reduce message by message:
`messages`. memory of a device: `memory`. what `auto` came to: `choices`. where each parameter
lies: `layout_table`. the devices here: `devices`. what rows of measurements hold: `rows`.
"""
