collect_ignore = ["toy_peer.py"]  # an adapter: only a worker process finds what it imports
