"""Evaluation of models: perplexity on raw text, and the tasks of lm-evaluation-harness."""
