"""What `scripts/fuzz.py` makes inputs from: `changes` of bytes, text and JSON, and `kinds` of them."""
