"""What the runs of ``train_net.py`` do alike on both engines."""
