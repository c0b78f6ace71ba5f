"""Captioned RGBA scenes from vector art, and a user's own pictures."""
