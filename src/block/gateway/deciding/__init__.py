"""Which instance: the evidence, the predictions and how far they hold, holding, admission, and what answers teach."""
