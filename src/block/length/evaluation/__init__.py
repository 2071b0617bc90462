"""How good an estimator is on unseen prompts, against baselines and the noise floor."""
