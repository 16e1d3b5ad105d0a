"""What each operation does to coordinates: functions over arrays, which know nothing of modules."""
