"""Measures of what a model draws: SceneEval, retrieval precision, Fréchet distance."""
