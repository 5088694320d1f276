/* Makes one chosen system call on files below $FAULT_ROOT fail, for scripts/fail_calls.py.

   Preloaded before libc, it stands before the calls by which files are changed; those of Python
   and those of libraries that write by themselves (tensorstore) alike. The program arms it:
   fault_arm(n, error) lets the n-th such call from now fail with `error`; 0 never. An `error`
   below 0 cuts a write short instead. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long seen, wanted;
static int error_of_it;
static char fired[600];

void fault_arm(long n, int error) {
  pthread_mutex_lock(&lock);
  seen = 0, wanted = n, error_of_it = error, fired[0] = 0;
  pthread_mutex_unlock(&lock);
}
long fault_seen(void) { return seen; }
const char *fault_fired(void) { return fired; }

static int below(const char *path) {
  const char *root = getenv("FAULT_ROOT");
  return root && path && strncmp(path, root, strlen(root)) == 0;
}

/* What a call is answered: 0, an error, or below 0 for a short write. */
static int hit(const char *call, const char *path) {
  int found = 0;
  if (!below(path)) return 0;
  pthread_mutex_lock(&lock);
  if (++seen == wanted) {
    found = error_of_it;
    snprintf(fired, sizeof fired, "%s %s", call, path);
  }
  pthread_mutex_unlock(&lock);
  return found;
}

static const char *path_of(int fd, char *buffer) {
  char link[40];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, buffer, 4095);
  if (size < 0) return NULL;
  buffer[size] = 0;
  return buffer;
}

static const char *path_at(int dir, const char *path, char *buffer) {
  if (!path || path[0] == '/') return path;
  char base[4096];
  if (dir == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(dir, base)) return path;
  snprintf(buffer, 8192, "%s/%s", base, path);
  return buffer;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(call, path)                 \
  do {                                   \
    int e = hit(call, path);             \
    if (e > 0) { errno = e; return -1; } \
  } while (0)

#define OPEN(name)                                                                   \
  int name(const char *path, int flags, ...) {                                       \
    va_list list;                                                                    \
    va_start(list, flags);                                                           \
    mode_t mode = va_arg(list, mode_t);                                              \
    va_end(list);                                                                    \
    char b[8192];                                                                    \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT)) FAIL("open", path_at(AT_FDCWD, path, b)); \
    return REAL(name)(path, flags, mode);                                            \
  }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                            \
  int name(int dir, const char *path, int flags, ...) {                         \
    va_list list;                                                               \
    va_start(list, flags);                                                      \
    mode_t mode = va_arg(list, mode_t);                                         \
    va_end(list);                                                               \
    char b[8192];                                                               \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT)) FAIL("open", path_at(dir, path, b)); \
    return REAL(name)(dir, path, flags, mode);                                  \
  }
OPENAT(openat)
OPENAT(openat64)

#define WRITE(name, call, size)                        \
  {                                                          \
    char b[4096];                                            \
    int e = hit("write", path_of(fd, b));                    \
    if (e > 0) { errno = e; return -1; }                     \
    if (e < 0 && size > 1) { size = size / 2; }              \
    return REAL(name) call;                                  \
  }
ssize_t write(int fd, const void *data, size_t n) WRITE(write, (fd, data, n), n)
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) WRITE(pwrite, (fd, data, n, at), n)
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) WRITE(pwrite64, (fd, data, n, at), n)
ssize_t writev(int fd, const struct iovec *parts, int n) WRITE(writev, (fd, parts, n), n)

int fsync(int fd) { char b[4096]; FAIL("fsync", path_of(fd, b)); return REAL(fsync)(fd); }
int fdatasync(int fd) { char b[4096]; FAIL("fsync", path_of(fd, b)); return REAL(fdatasync)(fd); }
int ftruncate(int fd, off_t n) { char b[4096]; FAIL("truncate", path_of(fd, b)); return REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { char b[4096]; FAIL("truncate", path_of(fd, b)); return REAL(ftruncate64)(fd, n); }
int rename(const char *a, const char *z) { char b[8192]; FAIL("rename", path_at(AT_FDCWD, z, b)); return REAL(rename)(a, z); }
int renameat(int d, const char *a, int e, const char *z) {
  char b[8192]; FAIL("rename", path_at(e, z, b)); return REAL(renameat)(d, a, e, z);
}
int mkdir(const char *path, mode_t mode) { char b[8192]; FAIL("mkdir", path_at(AT_FDCWD, path, b)); return REAL(mkdir)(path, mode); }
int mkdirat(int d, const char *path, mode_t mode) { char b[8192]; FAIL("mkdir", path_at(d, path, b)); return REAL(mkdirat)(d, path, mode); }
int unlink(const char *path) { char b[8192]; FAIL("unlink", path_at(AT_FDCWD, path, b)); return REAL(unlink)(path); }
int unlinkat(int d, const char *path, int flags) { char b[8192]; FAIL("unlink", path_at(d, path, b)); return REAL(unlinkat)(d, path, flags); }
int rmdir(const char *path) { char b[8192]; FAIL("rmdir", path_at(AT_FDCWD, path, b)); return REAL(rmdir)(path); }
