"""Conversion of FastSLM between a working directory, the authors' state_dict, PyTorch and PEFT."""
