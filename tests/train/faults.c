/* Counts what a process does to the files below FAULT_ROOT, and at operation `n` kills it or lets the disk be full.

   Loaded with LD_PRELOAD. Operations: creating or truncating a file, write, fsync, rename, mkdir, unlink, rmdir, chmod.
   fault_arm(mode, n, log): mode 1 dies before operation n; 2 dies in the middle of it (half of a write); 3: from n on
   nothing can be created or written (ENOSPC). Every operation goes to the file descriptor `log` as a line. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int mode, target, count, log_fd = -1;
static char root[PATH_MAX];
static __thread int inside;

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

void fault_arm(int m, int n, int log, const char *below) {
    mode = m; target = n; log_fd = log; count = 0;
    snprintf(root, sizeof root, "%s", below);
}

static const char *of_fd(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, buffer, PATH_MAX - 1);
    buffer[n < 0 ? 0 : n] = 0;
    return buffer;
}

static const char *of_path(int dir, const char *path, char *buffer) {
    if (path[0] == '/') { snprintf(buffer, PATH_MAX, "%s", path); return buffer; }
    if (dir == AT_FDCWD) { if (!getcwd(buffer, PATH_MAX)) buffer[0] = 0; } else of_fd(dir, buffer);
    size_t n = strlen(buffer);
    snprintf(buffer + n, PATH_MAX - n, "/%s", path);
    return buffer;
}

static void line(const char *kind, const char *path, long size, long inode) {
    char text[PATH_MAX + 80];
    int n = snprintf(text, sizeof text, "%d\t%s\t%s\t%ld\t%ld\n", count, kind, path + strlen(root), size, inode);
    if (REAL(write)(log_fd, text, n) != n) _exit(99);
}

/* 0: go on; ENOSPC: refuse; -1: tear (only a write asks). */
static int met(const char *kind, const char *path, int takes_space) {
    if (!mode || inside || strncmp(path, root, strlen(root))) return 0;
    inside = 1;
    count++;
    line(kind, path, -1, -1);
    inside = 0;
    if (mode == 1 && count == target) _exit(137);
    if (mode == 2 && count == target) return -1;
    if (mode == 3 && count >= target && takes_space) { errno = ENOSPC; return ENOSPC; }
    return 0;
}

static int opened(int dir, const char *path, int flags, mode_t bits) {
    char full[PATH_MAX];
    struct stat st;
    int creates = (flags & O_CREAT) && fstatat(dir, path, &st, 0) != 0;
    if ((creates || (flags & O_TRUNC)) && met("create", of_path(dir, path, full), 1) == ENOSPC) return -1;
    return REAL(openat)(dir, path, flags, bits);
}
#define OPEN_BITS mode_t bits = 0; if (flags & (O_CREAT | __O_TMPFILE)) { va_list a; va_start(a, flags); bits = va_arg(a, int); va_end(a); }
int open(const char *path, int flags, ...) { OPEN_BITS return opened(AT_FDCWD, path, flags, bits); }
int open64(const char *path, int flags, ...) { OPEN_BITS return opened(AT_FDCWD, path, flags, bits); }
int openat(int dir, const char *path, int flags, ...) { OPEN_BITS
    char full[PATH_MAX]; struct stat st;
    int creates = (flags & O_CREAT) && fstatat(dir, path, &st, 0) != 0;
    if ((creates || (flags & O_TRUNC)) && met("create", of_path(dir, path, full), 1) == ENOSPC) return -1;
    return REAL(openat)(dir, path, flags, bits); }
int openat64(int dir, const char *path, int flags, ...) { OPEN_BITS return opened(dir, path, flags, bits); }

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    if (mode && !inside && fd != log_fd) {
        int what = met("write", of_fd(fd, path), 1);
        if (what == ENOSPC) return -1;
        if (what == -1) { REAL(write)(fd, data, size / 2); _exit(137); }
    }
    return REAL(write)(fd, data, size);
}

static int synced(int fd, int (*sync)(int)) {
    char path[PATH_MAX];
    int what = met("fsync", of_fd(fd, path), 1);
    if (what == ENOSPC) return -1;
    if (what == -1) _exit(137);
    int status = sync(fd);
    struct stat st;
    if (mode && !strncmp(path, root, strlen(root)) && !fstat(fd, &st)) line("synced", path, st.st_size, st.st_ino);
    return status;
}
int fsync(int fd) { return synced(fd, REAL(fsync)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

#define AT(kind, space, dir, path) char full[PATH_MAX]; int what = met(kind, of_path(dir, path, full), space); if (what == ENOSPC) return -1;
#define TEAR if (what == -1) _exit(137); return status;
int rename(const char *a, const char *b) { AT("rename", 0, AT_FDCWD, b) int status = REAL(rename)(a, b); TEAR }
int renameat(int d, const char *a, int e, const char *b) { AT("rename", 0, e, b) int status = REAL(renameat)(d, a, e, b); TEAR }
int mkdir(const char *p, mode_t m) { AT("mkdir", 1, AT_FDCWD, p) int status = REAL(mkdir)(p, m); TEAR }
int mkdirat(int d, const char *p, mode_t m) { AT("mkdir", 1, d, p) int status = REAL(mkdirat)(d, p, m); TEAR }
int unlink(const char *p) { AT("unlink", 0, AT_FDCWD, p) int status = REAL(unlink)(p); TEAR }
int unlinkat(int d, const char *p, int f) { AT("unlink", 0, d, p) int status = REAL(unlinkat)(d, p, f); TEAR }
int rmdir(const char *p) { AT("rmdir", 0, AT_FDCWD, p) int status = REAL(rmdir)(p); TEAR }
int chmod(const char *p, mode_t m) { AT("chmod", 0, AT_FDCWD, p) int status = REAL(chmod)(p, m); TEAR }
int fchmodat(int d, const char *p, mode_t m, int f) { AT("chmod", 0, d, p) int status = REAL(fchmodat)(d, p, m, f); TEAR }
int ftruncate(int fd, off_t n) { char path[PATH_MAX]; int what = met("truncate", of_fd(fd, path), 1);
    if (what == ENOSPC) return -1; int status = REAL(ftruncate)(fd, n); TEAR }
