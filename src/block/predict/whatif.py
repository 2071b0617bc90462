"""What if this request went to that instance? Snapshot + request -> Prediction.

A *mirror* is the engine model's copy of one instance, kept in flat arrays: loaded from a snapshot, plus the requests
that were dispatched since and are not in it. One call asks any number of mirrors about one request.
"""
