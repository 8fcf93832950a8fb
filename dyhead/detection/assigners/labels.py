"""What an assigner says of places that are no object's."""

#: The place is to predict no class.
BACKGROUND = -1
#: What the place predicts costs nothing.
IGNORED = -2
