"""A base model's chat template: where it stands, and what it puts around a prompt.

The template (Jinja) is rendered a few times for probe words, which shows the tags around a photo and around words; a
prompt is then made of these (`lavic.model.prompts`). So it equals what `apply_chat_template` of transformers makes of
the same message, and words from data never pass through the template.
"""
