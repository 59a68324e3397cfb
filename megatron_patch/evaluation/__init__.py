"""How good a model is: on raw text, and on the tasks of the field's harness."""
