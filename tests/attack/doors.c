/*
 * What code inside a QEMU tries. Preloaded into it by a test: a thread waits until QEMU's seccomp filter is on, opens the
 * doors that DOORS lists, and writes what came of each to the descriptor REPORT.
 *
 * A door is a line "name argument"; the answer is "name 0" where it opened, or "name ERRNO". One more door is one more
 * function in the table at the end.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/fanotify.h>
#include <linux/inet_diag.h>
#include <linux/io_uring.h>
#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <linux/sock_diag.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* The same on all architectures, and not in every header (include/uapi/asm-generic/unistd.h). */
enum { PIDFD_SEND_SIGNAL = 424, IO_URING_SETUP = 425, IO_URING_ENTER = 426, FSOPEN = 430, FSCONFIG = 431, FSMOUNT = 432,
       PIDFD_OPEN = 434, PIDFD_GETFD = 438 };

static int result(long value) { return value < 0 ? errno : 0; }

static int opened(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return errno;
    close(fd);
    return 0;
}

static int read_file(const char *path) { return opened(path, O_RDONLY); }
static int write_file(const char *path) { return opened(path, O_WRONLY); }
static int cut_file(const char *path) { return result(truncate(path, 0)); }
static int see(const char *path) { struct stat found; return result(stat(path, &found)); }

static int list(const char *path)
{
    DIR *folder = opendir(path);
    if (!folder)
        return errno;
    closedir(folder);
    return 0;
}

static int lease(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC), error;
    if (fd < 0)
        return errno;
    error = result(fcntl(fd, F_SETLEASE, F_RDLCK));
    close(fd);
    return error;
}

static int lock(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC), error;
    if (fd < 0)
        return errno;
    error = result(flock(fd, LOCK_EX | LOCK_NB));
    close(fd);
    return error;
}

/* "folder/name": make, rename, delete, each as a person who may write there can. */
static int create(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno;
    close(fd);
    unlink(path);
    return 0;
}

static int fill(const char *path)
{
    static const char block[1 << 16];
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600), number;
    if (fd < 0)
        return errno;
    for (number = 0; number < 16; number++)
        if (write(fd, block, sizeof block) < 0)
            return errno;
    close(fd);
    unlink(path);
    return 0;
}

static int delete(const char *path)
{
    if (unlink(path))
        return errno;
    close(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    return 0;
}

static int rename_it(const char *path)
{
    char other[256];
    snprintf(other, sizeof other, "%s~", path);
    if (rename(path, other))
        return errno;
    rename(other, path);
    return 0;
}

static int two(const char *words, int (*use)(const char *, const char *))
{
    char first[256], second[256];
    sscanf(words, "%255s %255s", first, second);
    int error = result(use(first, second));
    if (!error)
        unlink(second);
    return error;
}

static int hard_link(const char *words) { return two(words, link); }
static int soft_link(const char *words) { return two(words, symlink); }

static int pipe_there(const char *path)
{
    int error = result(mkfifo(path, 0666));
    if (!error)
        unlink(path);
    return error;
}

static int device_there(const char *path)
{
    int error = result(mknod(path, S_IFCHR | 0666, 1 << 8 | 3));
    if (!error)
        unlink(path);
    return error;
}

static int socket_there(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), error;
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    error = result(bind(fd, (void *)&address, sizeof address));
    close(fd);
    if (!error)
        unlink(path);
    return error;
}

static int change_mode(const char *path) { return result(chmod(path, 0666)); }
static int change_owner(const char *path) { return result(chown(path, 0, 0)); }
static int change_time(const char *path) { return result(utimes(path, NULL)); }

static int watch(const char *path)
{
    int fd = inotify_init1(IN_CLOEXEC), error = result(inotify_add_watch(fd, path, IN_ALL_EVENTS));
    close(fd);
    return error;
}

static int watch_all(const char *unused)
{
    (void)unused;
    int fd = syscall(SYS_fanotify_init, FAN_CLASS_CONTENT | FAN_CLOEXEC, O_RDONLY);
    if (fd >= 0)
        close(fd);
    return result(fd);
}

/* "type bytes": a file by its handle, on the file system that programs are on (open_by_handle_at(2)). */
static int by_handle(const char *words)
{
    struct { struct file_handle head; unsigned char bytes[MAX_HANDLE_SZ]; } handle;
    char bytes[2 * MAX_HANDLE_SZ + 1];
    unsigned number;
    int fd, at = open("/usr/bin", O_RDONLY | O_CLOEXEC | O_DIRECTORY);
    if (at < 0)
        return errno;
    sscanf(words, "%d %256s", &handle.head.handle_type, bytes);
    handle.head.handle_bytes = strlen(bytes) / 2;
    for (number = 0; number < handle.head.handle_bytes; number++)
        sscanf(bytes + 2 * number, "%2hhx", &handle.head.f_handle[number]);
    fd = open_by_handle_at(at, &handle.head, O_RDONLY | O_CLOEXEC);
    close(at);
    return result(fd);
}

/* io_uring does what a system call does, and no seccomp filter sees it (io_uring(7)). */
static int by_ring(const char *path)
{
    struct io_uring_params set = {0};
    int ring = syscall(IO_URING_SETUP, 2, &set), done = -ENOMEM;
    if (ring < 0)
        return errno;
    size_t size = set.sq_off.array + set.sq_entries * sizeof(unsigned);
    size_t more = set.cq_off.cqes + set.cq_entries * sizeof(struct io_uring_cqe);
    char *rings = mmap(NULL, size > more ? size : more, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entry = mmap(NULL, set.sq_entries * sizeof *entry, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    if (rings != MAP_FAILED && entry != MAP_FAILED) {
        memset(entry, 0, sizeof *entry);
        entry->opcode = IORING_OP_OPENAT;
        entry->fd = AT_FDCWD;
        entry->addr = (unsigned long)path;
        entry->open_flags = O_RDONLY | O_CLOEXEC;
        *(unsigned *)(rings + set.sq_off.array) = 0;
        __atomic_store_n((unsigned *)(rings + set.sq_off.tail), 1, __ATOMIC_RELEASE);
        if (syscall(IO_URING_ENTER, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
            done = -errno;
        else
            done = ((struct io_uring_cqe *)(rings + set.cq_off.cqes))->res;
    }
    close(ring);
    return done < 0 ? -done : 0;
}

static int in_proc(const char *pid, const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/%s", pid, name);
    return read_file(path);
}

static int environment(const char *pid) { return in_proc(pid, "environ"); }
static int memory(const char *pid) { return in_proc(pid, "mem"); }
static int command_line(const char *pid) { return in_proc(pid, "cmdline"); }
static int send_signal(const char *pid) { return result(kill(atoi(pid), SIGCONT)); }

static int trace(const char *pid)
{
    int error = result(ptrace(PTRACE_SEIZE, atoi(pid), 0, 0));
    if (!error)
        ptrace(PTRACE_DETACH, atoi(pid), 0, 0);
    return error;
}

static int read_memory(const char *where)
{
    char byte;
    int pid;
    unsigned long address;
    struct iovec local = {&byte, 1}, remote = {NULL, 1};
    sscanf(where, "%d %lx", &pid, &address);
    remote.iov_base = (void *)address;
    return result(process_vm_readv(pid, &local, 1, &remote, 1, 0));
}

static int write_memory(const char *where)
{
    char byte;
    int pid;
    unsigned long address;
    struct iovec local = {&byte, 1}, remote = {NULL, 1};
    sscanf(where, "%d %lx", &pid, &address);
    remote.iov_base = (void *)address;
    if (process_vm_readv(pid, &local, 1, &remote, 1, 0) < 0)
        return errno;
    return result(process_vm_writev(pid, &local, 1, &remote, 1, 0));
}

static int signal_by_pidfd(const char *pid)
{
    int pidfd = syscall(PIDFD_OPEN, atoi(pid), 0), error;
    if (pidfd < 0)
        return errno;
    error = result(syscall(PIDFD_SEND_SIGNAL, pidfd, SIGCONT, NULL, 0));
    close(pidfd);
    return error;
}

static int queue_signal(const char *pid)
{
    siginfo_t told = {.si_code = SI_QUEUE, .si_signo = SIGCONT};
    told.si_pid = getpid();
    told.si_uid = getuid();
    return result(syscall(SYS_rt_sigqueueinfo, atoi(pid), SIGCONT, &told));
}

static int futexes(const char *pid)
{
    void *list;
    size_t length;
    return result(syscall(SYS_get_robust_list, atoi(pid), &list, &length));
}

static int compare(const char *pid) { return result(syscall(SYS_kcmp, getpid(), atoi(pid), 2 /* KCMP_FILES */, 0, 0) < 0 ? -1 : 0); }

static int perf(const char *pid)
{
    struct perf_event_attr event = {.type = PERF_TYPE_SOFTWARE, .size = sizeof event, .config = PERF_COUNT_SW_TASK_CLOCK, .exclude_kernel = 1, .exclude_hv = 1};
    int one = atoi(pid);
    int fd = syscall(SYS_perf_event_open, &event, one, one < 0 ? 0 : -1, -1, PERF_FLAG_FD_CLOEXEC);
    if (fd >= 0)
        close(fd);
    return result(fd);
}

static int slow_down(const char *pid) { return result(setpriority(PRIO_PROCESS, atoi(pid), 5)); }
static int hurry(const char *unused) { (void)unused; return result(setpriority(PRIO_PROCESS, 0, -5)); }

static int real_time(const char *unused)
{
    struct sched_param first = {.sched_priority = 1}, none = {0};
    (void)unused;
    int error = result(sched_setscheduler(0, SCHED_RR, &first));
    if (!error)
        sched_setscheduler(0, SCHED_OTHER, &none);
    return error;
}

static int pin(const char *pid)
{
    cpu_set_t first;
    CPU_ZERO(&first);
    CPU_SET(0, &first);
    return result(sched_setaffinity(atoi(pid), sizeof first, &first));
}

static int idle_io(const char *pid) { return result(syscall(SYS_ioprio_set, 1, atoi(pid), 3 << 13)); }

static int limit_other(const char *pid)
{
    struct rlimit found;
    if (prlimit(atoi(pid), RLIMIT_NOFILE, NULL, &found))
        return errno;
    return result(prlimit(atoi(pid), RLIMIT_NOFILE, &found, NULL));
}

static int take_descriptor(const char *pid)
{
    int pidfd = syscall(PIDFD_OPEN, atoi(pid), 0), error;
    if (pidfd < 0)
        return errno;
    error = result(syscall(PIDFD_GETFD, pidfd, 1, 0));
    close(pidfd);
    return error;
}

static int reach(const char *name, int is_abstract, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(name);
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0), error;
    if (fd < 0)
        return errno;
    memcpy(address.sun_path + is_abstract, name, length);
    error = result(connect(fd, (void *)&address, offsetof(struct sockaddr_un, sun_path) + is_abstract + length));
    close(fd);
    return error;
}

static int reach_socket(const char *path) { return reach(path, 0, SOCK_STREAM); }
static int reach_abstract(const char *name) { return reach(name, 1, SOCK_STREAM); }
static int reach_packets(const char *path) { return reach(path, 0, SOCK_SEQPACKET); }

static int tcp(const char *port, int (*use)(int, const struct sockaddr *, socklen_t))
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), error;
    if (fd < 0)
        return errno;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    error = result(use(fd, (void *)&address, sizeof address));
    close(fd);
    return error;
}

/* Who listens on that port: the kernel tells of all sockets of a network namespace (sock_diag(7)). */
static int see_listener(const char *port)
{
    struct { struct nlmsghdr head; struct inet_diag_req_v2 asked; } request = {
        .head = {.nlmsg_len = sizeof request, .nlmsg_type = SOCK_DIAG_BY_FAMILY, .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP},
        .asked = {.sdiag_family = AF_INET, .sdiag_protocol = IPPROTO_TCP, .idiag_states = 1 << 10},
    };
    static char answer[1 << 16];
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG), error = ENOENT;
    ssize_t length;
    if (fd < 0)
        return errno;
    if (send(fd, &request, sizeof request, 0) < 0)
        return errno;
    while (error == ENOENT && (length = recv(fd, answer, sizeof answer, 0)) > 0) {
        struct nlmsghdr *one = (void *)answer;
        for (; NLMSG_OK(one, (unsigned)length); one = NLMSG_NEXT(one, length)) {
            struct inet_diag_msg *found = NLMSG_DATA(one);
            if (one->nlmsg_type == NLMSG_DONE || one->nlmsg_type == NLMSG_ERROR)
                error = error ? EADDRNOTAVAIL : 0;
            else if (ntohs(found->id.idiag_sport) == atoi(port))
                error = 0;
        }
    }
    close(fd);
    return error;
}

static int reach_tcp(const char *port) { return tcp(port, connect); }

/* "port known": in a network in which there is somebody else at that known port. Elsewhere anybody may listen. */
static int listen_tcp(const char *ports)
{
    char port[16], known[16];
    sscanf(ports, "%15s %15s", port, known);
    int error = see_listener(known);
    return error ? error : tcp(port, bind);
}

/* Take over the port of another: the kernel shares one among sockets of one user (socket(7), SO_REUSEPORT). */
static int share_port(const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1, error = see_listener(port);
    if (fd < 0 || error)
        return error ? error : errno;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on);
    error = result(bind(fd, (void *)&address, sizeof address));
    if (!error)
        error = result(listen(fd, 1));
    close(fd);
    return error;
}

static int reach_udp(const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    struct timeval limit = {.tv_sec = 2};
    char answer;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), error;
    if (fd < 0)
        return errno;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    error = result(connect(fd, (void *)&address, sizeof address));
    if (!error)
        error = result(send(fd, "?", 1, 0));
    if (!error)
        error = result(recv(fd, &answer, 1, 0));
    close(fd);
    return error;
}

static int raw_socket(const char *family)
{
    int fd = socket(atoi(family), SOCK_RAW | SOCK_CLOEXEC, atoi(family) == AF_INET ? IPPROTO_ICMP : 0);
    if (fd >= 0)
        close(fd);
    return result(fd);
}

/* --- objects of the kernel ---------------------------------------------------------------------------------- */

static int semaphores(const char *key) { return result(semget(atoi(key), 0, 0)); }
static int messages(const char *key) { return result(msgget(atoi(key), 0)); }

static int message_queue(const char *name)
{
    mqd_t found = mq_open(name, O_RDWR);
    if (found == (mqd_t)-1)
        return errno;
    mq_close(found);
    return 0;
}

static int key_of_user(const char *name) { return result(syscall(SYS_keyctl, 10 /* SEARCH */, -4 /* user */, "user", name, 0)); }
static int key_of_session(const char *name) { return result(syscall(SYS_keyctl, 10, -3 /* session */, "user", name, 0)); }

static int filter_program(const char *unused)
{
    static const struct bpf_insn program[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K}, {.code = BPF_JMP | BPF_EXIT}};
    union bpf_attr load = {.prog_type = BPF_PROG_TYPE_SOCKET_FILTER, .insns = (unsigned long)program, .insn_cnt = 2, .license = (unsigned long)"GPL"};
    (void)unused;
    return result(syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load));
}

static int page_faults(const char *unused)
{
    (void)unused;
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    if (fd >= 0)
        close(fd);
    return result(fd);
}

static int host_name(const char *unused)
{
    char name[256];
    (void)unused;
    gethostname(name, sizeof name);
    return result(sethostname(name, strlen(name)));
}

static int new_mount(const char *unused)
{
    (void)unused;
    int made = syscall(FSOPEN, "tmpfs", 1), error;
    if (made < 0)
        return errno;
    error = result(syscall(FSCONFIG, made, 6 /* create */, NULL, NULL, 0));
    if (!error)
        error = result(syscall(FSMOUNT, made, 1, 0));
    close(made);
    return error;
}

static int type_for_others(const char *terminal)
{
    int fd = open(terminal, O_RDWR | O_NOCTTY | O_CLOEXEC), error;
    if (fd < 0)
        return errno;
    error = result(ioctl(fd, TIOCSTI, "x"));
    close(fd);
    return error;
}

/* --- what it has been given --------------------------------------------------------------------------------- */

static int map_for_writing(const char *fd)
{
    char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(fd), 0);
    if (page == MAP_FAILED)
        return errno;
    page[0] = 'x';
    munmap(page, 4096);
    return 0;
}

static int again(const char *fd, int flags)
{
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%s", fd);
    return open(name, flags | O_CLOEXEC | O_NONBLOCK);
}

static int reopen_to_write(const char *fd)
{
    int found = again(fd, O_RDWR), error;
    if (found < 0)
        return errno;
    error = result(pwrite(found, "x", 1, 0));
    close(found);
    return error;
}

static int reopen_to_read(const char *fd)
{
    char byte;
    int found = again(fd, O_RDONLY), error;
    if (found < 0)
        return errno;
    error = result(read(found, &byte, 1));
    close(found);
    return error;
}

static int make_longer(const char *fd) { return result(ftruncate(atoi(fd), 1L << 30)); }
static int empty_it(const char *fd) { return result(ftruncate(atoi(fd), 0)); }

static void *rest(void *gate) { pthread_mutex_lock(gate); pthread_mutex_unlock(gate); return NULL; }

static int many_threads(const char *count)
{
    static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    static pthread_t threads[8192];
    pthread_attr_t small;
    int number = 0, made, error = 0;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 16384);
    pthread_mutex_lock(&gate);
    for (; number < atoi(count) && !error; number++)
        error = pthread_create(&threads[number], &small, rest, &gate);
    pthread_mutex_unlock(&gate);
    for (made = 0; made < number - !!error; made++)
        pthread_join(threads[made], NULL);
    return error;
}

static int many_files(const char *count)
{
    static int files[65536];
    int number = 0, made, error = 0;
    for (; number < atoi(count) && !error; number++)
        if ((files[number] = dup(2)) < 0)
            error = errno;
    for (made = 0; made < number - !!error; made++)
        close(files[made]);
    return error;
}

static int dump_core(const char *unused)
{
    struct rlimit found;
    (void)unused;
    getrlimit(RLIMIT_CORE, &found);
    found.rlim_cur = found.rlim_max;
    return setrlimit(RLIMIT_CORE, &found) ? errno : found.rlim_cur ? 0 : EPERM;
}

static int shared_memory(const char *key) { return result(shmget(atoi(key), 0, 0)); }

static int be_root(const char *unused) { (void)unused; return result(syscall(SYS_setresuid, 0, 0, 0)); }
static int leave_root(const char *unused) { (void)unused; return result(chroot("/")); }

static int mount_one(const char *at)
{
    int error = result(mount("x", at, "tmpfs", 0, NULL));
    if (!error)
        umount2(at, MNT_DETACH);
    return error;
}

/* In a child: what QEMU's filter is to forbid may be tried without an end of this process where it is not there. */
static int in_child(int (*use)(const char *), const char *argument)
{
    int status;
    /* As fork() does, but without QEMU's handler that starts a thread in the child. */
    pid_t child = syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
    if (child < 0)
        return errno;
    if (child == 0)
        _exit(use(argument));
    /* QEMU has a handler for the end of children. */
    if (TEMP_FAILURE_RETRY(waitpid(child, &status, 0)) < 0)
        return errno;
    return WIFEXITED(status) ? WEXITSTATUS(status) : ECHILD;
}

static int nothing(const char *unused) { (void)unused; return 0; }

static int become(const char *path)
{
    char *const words[] = {(char *)path, NULL};
    execv(path, words);
    return errno;
}

static int become_memory(const char *path)
{
    static char program[1 << 20];
    char *const words[] = {"x", NULL};
    int from = open(path, O_RDONLY | O_CLOEXEC), to = memfd_create("x", MFD_CLOEXEC);
    ssize_t length = read(from, program, sizeof program);
    if (length <= 0 || write(to, program, length) != length)
        return EIO;
    syscall(SYS_execveat, to, "", words, environ, AT_EMPTY_PATH);
    return errno;
}

static int be_root_of_own(const char *unused) { (void)unused; return result(unshare(CLONE_NEWUSER | CLONE_NEWNS)); }

static int fork_once(const char *unused) { return in_child(nothing, unused); }
static int run(const char *path) { return in_child(become, path); }
static int run_memory(const char *path) { return in_child(become_memory, path); }
static int user_namespace(const char *unused) { return in_child(be_root_of_own, unused); }

static int enter_namespace(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC), error;
    if (fd < 0)
        return errno;
    error = result(setns(fd, 0));
    close(fd);
    return error;
}

static const struct {
    const char *name;
    int (*open)(const char *);
} doors[] = {
    {"read_file", read_file},
    {"write_file", write_file},
    {"cut_file", cut_file},
    {"see", see},
    {"list", list},
    {"lease", lease},
    {"lock", lock},
    {"create", create},
    {"fill", fill},
    {"delete", delete},
    {"rename_it", rename_it},
    {"hard_link", hard_link},
    {"soft_link", soft_link},
    {"pipe_there", pipe_there},
    {"device_there", device_there},
    {"socket_there", socket_there},
    {"change_mode", change_mode},
    {"change_owner", change_owner},
    {"change_time", change_time},
    {"watch", watch},
    {"watch_all", watch_all},
    {"by_handle", by_handle},
    {"by_ring", by_ring},
    {"environment", environment},
    {"memory", memory},
    {"command_line", command_line},
    {"send_signal", send_signal},
    {"signal_by_pidfd", signal_by_pidfd},
    {"queue_signal", queue_signal},
    {"trace", trace},
    {"read_memory", read_memory},
    {"write_memory", write_memory},
    {"take_descriptor", take_descriptor},
    {"futexes", futexes},
    {"compare", compare},
    {"perf", perf},
    {"slow_down", slow_down},
    {"hurry", hurry},
    {"real_time", real_time},
    {"pin", pin},
    {"idle_io", idle_io},
    {"limit_other", limit_other},
    {"reach_socket", reach_socket},
    {"reach_abstract", reach_abstract},
    {"reach_packets", reach_packets},
    {"reach_tcp", reach_tcp},
    {"listen_tcp", listen_tcp},
    {"share_port", share_port},
    {"reach_udp", reach_udp},
    {"raw_socket", raw_socket},
    {"see_listener", see_listener},
    {"shared_memory", shared_memory},
    {"semaphores", semaphores},
    {"messages", messages},
    {"message_queue", message_queue},
    {"key_of_user", key_of_user},
    {"key_of_session", key_of_session},
    {"filter_program", filter_program},
    {"page_faults", page_faults},
    {"host_name", host_name},
    {"new_mount", new_mount},
    {"type_for_others", type_for_others},
    {"map_for_writing", map_for_writing},
    {"reopen_to_write", reopen_to_write},
    {"reopen_to_read", reopen_to_read},
    {"make_longer", make_longer},
    {"empty_it", empty_it},
    {"many_threads", many_threads},
    {"many_files", many_files},
    {"dump_core", dump_core},
    {"be_root", be_root},
    {"leave_root", leave_root},
    {"mount_one", mount_one},
    {"fork_once", fork_once},
    {"run", run},
    {"run_memory", run_memory},
    {"user_namespace", user_namespace},
    {"enter_namespace", enter_namespace},
};

static int is_filtered(void)
{
    char line[256];
    int found = 0;
    FILE *status = fopen("/proc/self/status", "r");
    if (!status)
        return 0;
    while (!found && fgets(line, sizeof line, status))
        found = !strncmp(line, "Seccomp:\t2", 10);
    fclose(status);
    return found;
}

struct attempt { int (*open)(const char *); const char *argument; int error, is_over; };

static void *attempt(void *given)
{
    struct attempt *it = given;
    it->error = it->open(it->argument);
    it->is_over = 1;
    return NULL;
}

static void *try_all(void *report)
{
    pthread_t thread;
    char *line, *rest, *lines = strdup(getenv("DOORS"));
    unsigned number;
    while (!getenv("UNFILTERED") && !is_filtered())
        usleep(2000);
    for (line = strtok_r(lines, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char *argument = strchr(line, ' ');
        *argument++ = 0;
        for (number = 0; number < sizeof doors / sizeof *doors; number++)
            if (!strcmp(doors[number].name, line)) {
                /* In a thread of its own: a filter may end it alone, and namespaces belong to a thread. */
                struct attempt it = {.open = doors[number].open, .argument = argument};
                if (pthread_create(&thread, NULL, attempt, &it))
                    continue;
                pthread_join(thread, NULL);
                if (it.is_over)
                    dprintf((int)(long)report, "%s %s %d\n", line, argument, it.error);
            }
    }
    close((int)(long)report);
    return NULL;
}

__attribute__((constructor)) static void begin(void)
{
    char name[32] = "";
    pthread_t thread;
    FILE *comm = fopen("/proc/self/comm", "r");
    if (comm) {
        if (!fgets(name, sizeof name, comm))
            name[0] = 0;
        fclose(comm);
    }
    /* Not in setpriv or a shell, which are preloaded, too, and become QEMU. */
    if (!strncmp(name, "qemu-system", 11) && getenv("REPORT"))
        pthread_create(&thread, NULL, try_all, (void *)atol(getenv("REPORT")));
}
