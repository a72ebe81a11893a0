"""The way of an attention call, from a public function to a result."""
