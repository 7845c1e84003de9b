"""What starts work: the commands that train, evaluate and recommend; installed as `lavic.launch`."""
