"""Maps stored tensors of other programs to our parameter tree."""
