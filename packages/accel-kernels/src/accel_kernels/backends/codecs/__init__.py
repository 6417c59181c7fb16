"""The back ends of the codec ops; ``dispatch_codecs`` loads one when a call needs it."""
