"""The kernel's language: the only package that imports pyfuse3 or knows errno.

operations.py  handlers, short and without policy
errnos.py      the one table from our errors to errno
kernel.py      read-ahead and queue limits, set through sysfs after mounting
"""
