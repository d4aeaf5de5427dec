/*
 * A QEMU that a guest has taken over, as its supervisor meets it: a program in QEMU's place that does to QMP, and to its
 * host, what the word behind `rogue=` in its command line says. Without that word it becomes the real QEMU.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define GREETING "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n"
#define CHUNK (1 << 16)

static char chunk[CHUNK];

/* All of it, or the other side hung up. */
static int tell(int to, const char *text, size_t length)
{
    while (length) {
        ssize_t told = write(to, text, length);
        if (told <= 0)
            return -1;
        text += told;
        length -= told;
    }
    return 0;
}

static int say(int to, const char *text) { return tell(to, text, strlen(text)); }

static char command[4096];
static const char *uuid = "";
static const char *volatile state = "prelaunch";

/* Read one command; its id, or -1 when the other side hung up. */
static long heard(int from)
{
    char *id;
    size_t length = 0;
    int depth = 0;
    do {
        if (length == sizeof command - 1 || read(from, command + length, 1) <= 0)
            return -1;
        depth += command[length] == '{';
        depth -= command[length] == '}';
        length++;
    } while (depth);
    command[length] = 0;
    id = strstr(command, "\"id\": ");
    return id ? atol(id + 6) : -1;
}

static int answer(int to, long id, const char *what)
{
    char line[512];
    snprintf(line, sizeof line, "{\"return\": %s, \"id\": %ld}\r\n", what, id);
    return say(to, line);
}

static int asks(const char *what) { return strstr(command, what) != NULL; }

/* Answer as a QEMU does, as far as its supervisor cannot do without. */
static int serve(int with, long id)
{
    char line[128];
    if (asks("\"query-uuid\""))
        snprintf(line, sizeof line, "{\"UUID\": \"%s\"}", uuid);
    else if (asks("\"query-status\""))
        snprintf(line, sizeof line, "{\"status\": \"%s\"}", state);
    else {
        if (asks("\"cont\""))
            state = "running";
        strcpy(line, asks("\"query-") ? "[]" : "{}");
    }
    return answer(with, id, line);
}

/* A line without an end, of so many chunks. */
static int rave(int to, long chunks)
{
    memset(chunk, 'x', sizeof chunk);
    if (say(to, "{\"event\": \"X\", \"data\": {\"x\": \""))
        return -1;
    while (chunks--)
        if (tell(to, chunk, sizeof chunk))
            return -1;
    return 0;
}

static void send_descriptors(int to)
{
    int fds[64];
    char control[CMSG_SPACE(sizeof fds)] = {0};
    static char event[] = "{\"event\": \"RTC_CHANGE\", \"data\": {}}\r\n";
    struct iovec text = {event, sizeof event - 1};
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    size_t number;
    for (number = 0; number < sizeof fds / sizeof *fds; number++)
        fds[number] = open("/dev/null", O_RDONLY);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof fds);
    memcpy(CMSG_DATA(head), fds, sizeof fds);
    while (sendmsg(to, &message, 0) > 0)
        usleep(1000);
}

/* Answers that have the form of one, and not the content. */
static int lie(int with, long id)
{
    static const char *lies[] = {"null", "[]", "{}", "1", "\"x\"", "[null]", "[[]]", "[{}]", "{\"status\": []}",
                                 "[{\"device\": 1, \"stats\": []}]", "[{\"inserted\": 1, \"stats\": {\"rd_bytes\": {}}}]"};
    static size_t next;
    return answer(with, id, lies[next++ % (sizeof lies / sizeof *lies)]);
}

/* Refuse with a megabyte of words, or tell as much of a state. */
static int ramble(int with, long id)
{
    char end[64];
    int chunks = 15, is_state = asks("\"query-status\"");
    memset(chunk, 'x', sizeof chunk);
    if (say(with, is_state ? "{\"return\": {\"status\": \"" : "{\"error\": {\"class\": \"GenericError\", \"desc\": \""))
        return -1;
    while (chunks--)
        if (tell(with, chunk, sizeof chunk))
            return -1;
    snprintf(end, sizeof end, "\"}, \"id\": %ld}\r\n", id);
    return say(with, end);
}

/* One connection, once the guest runs. */
static void misbehave(int with, const char *how)
{
    long id;
    if (!strcmp(how, "endless"))
        rave(with, 1L << 14);
    else if (!strcmp(how, "large")) {
        /* Each is a message that is just allowed. */
        while (!rave(with, 15) && !say(with, "\"}}\r\n"))
            ;
    } else if (!strcmp(how, "nonsense"))
        say(with, "nonsense\r\n");
    else if (!strcmp(how, "hangup"))
        return;
    else if (!strcmp(how, "events")) {
        while (!say(with, "{\"event\": \"RESET\", \"data\": {\"guest\": true}}\r\n{\"event\": \"STOP\"}\r\n"))
            ;
    } else if (!strcmp(how, "answers")) {
        while (!say(with, "{\"return\": {}, \"id\": 1}\r\n{\"error\": {\"desc\": \"no\"}, \"id\": 7}\r\n"))
            ;
    } else if (!strcmp(how, "descriptors"))
        send_descriptors(with);
    else if (!strcmp(how, "verbose")) {
        say(with, "{\"event\": \"STOP\"}\r\n");
        while ((id = heard(with)) >= 0 && !ramble(with, id))
            ;
    } else if (!strcmp(how, "lies")) {
        say(with, "{\"event\": \"STOP\"}\r\n");
        while ((id = heard(with)) >= 0 && !lie(with, id))
            say(with, "{\"event\": \"STOP\"}\r\n");
    } else
        while ((id = heard(with)) >= 0 && !serve(with, id))
            ;
}

static void converse(int with, const char *how)
{
    long id;
    if (say(with, GREETING))
        return;
    do
        if ((id = heard(with)) < 0 || serve(with, id))
            return;
    while (strcmp(state, "running"));
    misbehave(with, how);
}

static void *idle(void *unused)
{
    (void)unused;
    while (1)
        pause();
    return NULL;
}

/* Take what this user may have of threads, processes and files. */
static void *grab(void *how)
{
    if (!strcmp(how, "threads")) {
        pthread_attr_t small;
        pthread_t thread;
        pthread_attr_init(&small);
        pthread_attr_setstacksize(&small, 16384);
        while (1)
            if (pthread_create(&thread, &small, idle, NULL))
                usleep(100000);
    }
    if (!strcmp(how, "forks"))
        while (1) {
            pid_t child = fork();
            if (!child) {
                /* The test that ends this one ends them all. */
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                while (1)
                    pause();
            }
            if (child < 0)
                usleep(100000);
        }
    if (!strcmp(how, "files"))
        while (1)
            if (dup(2) < 0)
                usleep(100000);
    return NULL;
}

int main(int count, char **words)
{
    const char *how = NULL;
    int number, listener = -1;
    for (number = 1; number < count; number++) {
        char *found = strstr(words[number], "rogue=");
        if (found)
            how = found + strlen("rogue=");
        if (!strcmp(words[number - 1], "-uuid"))
            uuid = words[number];
        if (!strncmp(words[number], "socket,id=qmp0,fd=", 18))
            listener = atoi(words[number] + 18);
    }
    if (!how || listener < 0) {
        execvp("qemu-system-x86_64", words);
        return 127;
    }
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    if (!strcmp(how, "silent"))
        while (1)
            pause();
    pthread_t taker;
    pthread_create(&taker, NULL, grab, (void *)how);
    while (1) {
        int with = accept(listener, NULL, NULL);
        if (with < 0) {
            /* All files are taken: let one go for it. */
            close(3 + rand() % 1000);
            continue;
        }
        converse(with, how);
        close(with);
    }
}
