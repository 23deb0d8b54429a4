"""What is particular to timm, transformers and torchvision: names to models, and inputs to run them on.

Each adapter is found by its entry point in the group ``cocktailsdk.adapters``, and imports its library when it is
first asked for a model.
"""
