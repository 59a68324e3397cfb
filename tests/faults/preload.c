/* Reads and writes that fail as on a bad disk, for paths that contain FAULT_PATH: FAULT=eio_read, eio_write, eio_fsync, enospc, short. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int hit(int descriptor, const char *kind) {
  const char *fault = getenv("FAULT"), *part = getenv("FAULT_PATH");
  if (!fault || !part || strcmp(fault, kind)) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strstr(path, part) != NULL;
}

ssize_t read(int descriptor, void *buffer, size_t count) {
  static ssize_t (*real)(int, void *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "read");
  if (hit(descriptor, "eio_read")) return errno = EIO, -1;
  return real(descriptor, buffer, count);
}

ssize_t write(int descriptor, const void *buffer, size_t count) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "write");
  if (hit(descriptor, "eio_write")) return errno = EIO, -1;
  if (hit(descriptor, "enospc")) return errno = ENOSPC, -1;
  /* A short write is no error: the caller has to go on. */
  if (count > 1 && hit(descriptor, "short")) count = count / 2 + 1;
  return real(descriptor, buffer, count);
}

int fsync(int descriptor) {
  static int (*real)(int);
  if (!real) real = dlsym(RTLD_NEXT, "fsync");
  if (hit(descriptor, "eio_fsync")) return errno = EIO, -1;
  return real(descriptor);
}
