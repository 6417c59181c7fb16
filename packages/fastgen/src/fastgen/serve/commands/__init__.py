"""The commands of `fastgen`, one file each, and the `options` that they share. Put together by `cli`."""
