"""Ways of training, compared at equal cost: the arms of a study, its runs, and the tables and plots of their results."""
