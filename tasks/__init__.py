"""seqio Tasks and Mixtures: which text there is, in which language, in which share.

Importing this package, or `languages`, loads neither TensorFlow nor seqio; registering does.
"""
