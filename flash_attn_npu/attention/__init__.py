"""One attention problem on its way to a kernel: described, judged, dispatched, answered."""
