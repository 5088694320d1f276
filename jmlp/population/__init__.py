"""Many multilayer perceptrons at once: members of a population in one compiled program.

what is searched over, as a config says it: `space`. Methods that choose trials (grid, random,
Sobol, Optuna's, halving): `methods`. Members that one program trains, widths padded: `groups`.
Initial weights at true shapes, masks, cutting: `widths`. The compiled program: `program`.
A member's own numbers: `numbers`. A sweep from its config to its leaderboard: `sweep`; what it
keeps on disk: `store`. A member's config: `members`; as a run directory of its own: `export`.
"""
