"""Backbones: any Hugging Face architecture, and crammed-bert."""
