"""Every row of both tables, run on the device at hand and compared with float64 on the host.

`cases` are questions, each answered by a public function; `truth` is the float64 answer; `worker`
runs cases in a child process, `session` starts it, survives its death and keeps what was done;
`report` is the file that comes of it. What it knows of kernels is read from the table.
"""
