"""Conversion between checkpoint layouts: tables of names (`layouts`), one strict engine (`engine`), files (`tensors`)."""
