"""Every attention model: tiny ones built from transformers' configurations, and what each probe must say of them by transformers alone."""
