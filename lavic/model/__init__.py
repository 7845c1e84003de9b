"""The vision-language model: views, prompts, item tokens, adapters, item store, bundle."""
