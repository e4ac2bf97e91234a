def attention(*arguments, **options):
    raise RuntimeError("attention is being written")
