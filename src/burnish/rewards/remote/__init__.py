"""Rewards that another machine judges.

`client` asks, `server` and `ray` answer. `wire` is what they say, `flow_grpo` another tongue, `arrays` their pictures;
`exchange` is one request, `batches` are several that are judged together.
"""
