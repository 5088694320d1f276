"""What `scripts/mutate.py` breaks: `known` lines that once survived, and `sites` of any module."""
