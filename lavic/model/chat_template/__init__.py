"""The chat template of a base model, and the tags that it puts around a prompt.

The template (Jinja) is rendered for a probe text, which shows the tags around text and photos; prompts are then built
from these tags (`lavic.model.prompts`). The result equals that of `apply_chat_template` of transformers, but text from
data never passes through the template.
"""
