"""What servers that are started here learn: PYTHONPATH of their process has this folder, where SGLang finds plugins."""
