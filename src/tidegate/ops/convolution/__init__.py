def short_convolution(*arguments, **options):
    raise RuntimeError("short_convolution is being written")
