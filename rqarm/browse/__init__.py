"""What an operator looks at and does: search, one request in full, the cache, claims, workers.

Every look is a bounded piece of work for the server and at most three round trips, whatever is stored: pages of
indexes, counts, samples; never a walk over the key space. What changes something is a transition like the others.
"""
