/* Preloaded into a process: counts what it does to files below one folder, and makes one of these operations go wrong.

Operations are of class 'w' (make, write, cut, flush) or 'c' (rename, link, remove: what commits). Nothing happens until
fault_arm is called. Of a name that glibc exports in two forms, both are wrapped. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FULL, FAIL, SLOW }; /* as in shim.py */

static char prefix[4096], mask[8];
static int armed, action, millis, record = -1;
static long target;
static atomic_long seen;

/* Raw system calls, since the library's own functions are the ones that are wrapped here. */
static void note(const char *what, const char *path) {
    char line[4400];
    int size = snprintf(line, sizeof line, "%s %s\n", what, path);
    if (record >= 0) syscall(SYS_write, record, line, size);
}

void fault_arm(const char *folder, const char *classes, int what, long number, int delay, const char *report) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    snprintf(mask, sizeof mask, "%s", classes);
    action = what, target = number, millis = delay;
    record = syscall(SYS_openat, AT_FDCWD, report, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    armed = 1;
}

/* Whether this operation is below the folder; `full` receives its path. */
static int ours(int directory, const char *path, char *full) {
    char link[64];
    ssize_t size = 0;
    if (path && path[0] == '/') {
        snprintf(full, 4096, "%s", path);
    } else {
        snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
        size = syscall(SYS_readlinkat, AT_FDCWD, link, full, 4000);
        if (size <= 0) return 0;
        full[size] = 0;
        if (path) snprintf(full + size, 4096 - size, "/%s", path);
    }
    return strncmp(full, prefix, strlen(prefix)) == 0;
}

/* 0 = go on, 1 = do half of it and die, else the error to return. */
static int meet(char class, const char *what, int directory, const char *path) {
    char full[4200];
    if (!armed || !strchr(mask, class)) return 0;
    int before = errno;
    if (!ours(directory, path, full)) {
        errno = before;
        return 0;
    }
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (action == COUNT) note(what, full);
    int hit = action == FULL ? number >= target : number == target;
    if (action == SLOW) {
        if (number == 1) note("FIRED", full);
        usleep(millis * 1000);
    } else if (action != COUNT && hit) {
        if (number == target) note("FIRED", full);
        if (action == KILL) syscall(SYS_kill, getpid(), SIGKILL);
        if (action == TEAR) return 1;
        return action == FULL ? ENOSPC : EIO;
    }
    errno = before;
    return 0;
}

#define REAL(type, name, args) \
    static type(*real) args; \
    if (!real) real = dlsym(RTLD_NEXT, #name)
#define FAILS(class, directory, path) \
    do { \
        int wrong = meet(class, __func__, directory, path); \
        if (wrong == 1) syscall(SYS_kill, getpid(), SIGKILL); \
        if (wrong) { \
            errno = wrong; \
            return -1; \
        } \
    } while (0)
#define MODE(last) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, last); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, (const char *, int, ...)); \
        MODE(flags) \
        if (flags & (O_CREAT | O_TRUNC)) FAILS('w', AT_FDCWD, path); \
        return real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        REAL(int, name, (int, const char *, int, ...)); \
        MODE(flags) \
        if (flags & (O_CREAT | O_TRUNC)) FAILS('w', directory, path); \
        return real(directory, path, flags, mode); \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    int wrong = meet('w', "write", fd, NULL);
    if (wrong == 1) {
        syscall(SYS_write, fd, data, size / 2);
        syscall(SYS_kill, getpid(), SIGKILL);
    }
    if (wrong) {
        errno = wrong;
        return -1;
    }
    return syscall(SYS_write, fd, data, size);
}
#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t size, off_t at) { \
        REAL(ssize_t, name, (int, const void *, size_t, off_t)); \
        FAILS('w', fd, NULL); \
        return real(fd, data, size, at); \
    }
PWRITE(pwrite) PWRITE(pwrite64)
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, (int, const struct iovec *, int));
    FAILS('w', fd, NULL);
    return real(fd, parts, count);
}
#define ON_FILE(name) \
    int name(int fd) { \
        REAL(int, name, (int)); \
        FAILS('w', fd, NULL); \
        return real(fd); \
    }
ON_FILE(fsync) ON_FILE(fdatasync)
#define CUT(name) \
    int name(int fd, off_t size) { \
        REAL(int, name, (int, off_t)); \
        FAILS('w', fd, NULL); \
        return real(fd, size); \
    }
CUT(ftruncate) CUT(ftruncate64)
int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, (const char *, mode_t));
    FAILS('w', AT_FDCWD, path);
    return real(path, mode);
}
int mkdirat(int directory, const char *path, mode_t mode) {
    REAL(int, mkdirat, (int, const char *, mode_t));
    FAILS('w', directory, path);
    return real(directory, path, mode);
}
int rename(const char *from, const char *to) {
    REAL(int, rename, (const char *, const char *));
    FAILS('c', AT_FDCWD, to);
    return real(from, to);
}
int renameat(int one, const char *from, int two, const char *to) {
    REAL(int, renameat, (int, const char *, int, const char *));
    FAILS('c', two, to);
    return real(one, from, two, to);
}
int link(const char *from, const char *to) {
    REAL(int, link, (const char *, const char *));
    FAILS('c', AT_FDCWD, to);
    return real(from, to);
}
int linkat(int one, const char *from, int two, const char *to, int flags) {
    REAL(int, linkat, (int, const char *, int, const char *, int));
    FAILS('c', two, to);
    return real(one, from, two, to, flags);
}
int unlink(const char *path) {
    REAL(int, unlink, (const char *));
    FAILS('c', AT_FDCWD, path);
    return real(path);
}
int unlinkat(int directory, const char *path, int flags) {
    REAL(int, unlinkat, (int, const char *, int));
    FAILS('c', directory, path);
    return real(directory, path, flags);
}
int rmdir(const char *path) {
    REAL(int, rmdir, (const char *));
    FAILS('c', AT_FDCWD, path);
    return real(path);
}
