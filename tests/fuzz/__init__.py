"""The differential fuzzer: cases.py and damage.py make files, differential.py compares."""
