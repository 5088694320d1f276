"""What `scripts/fuzz.py` makes inputs from: `changes` of bytes and text, `kinds` of them."""
