"""A server with OpenAI's HTTP interface, and a page to try it: `python -m fastslm_jax.serve`.

asks      request bodies → `Ask`
worker    the thread that owns the model
replies   results → JSON, text, subtitles, server-sent events
app       routes, limits, metrics
"""
