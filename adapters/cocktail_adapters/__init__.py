"""What is particular to model libraries: names to models, and inputs to run them on."""
