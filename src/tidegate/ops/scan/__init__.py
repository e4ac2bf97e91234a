def scan(*arguments, **options):
    raise RuntimeError("scan is being written")
