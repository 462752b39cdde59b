"""What pages ask the store, in SQL: functions of a connection and plain values that return small tables."""
