"""What every stage stands on: records, artifacts, parts, devices, processes, progress."""
