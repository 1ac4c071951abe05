/* A minimal echo server on epoll, without framing or limits.
   Prints "listening on 127.0.0.1:PORT" and serves until it is killed. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static char data[1 << 18];

/* Blocks the other clients while this one does not read: enough for a benchmark. */
static int send_all(int client, ssize_t size) {
    for (ssize_t sent = 0; sent < size;) {
        ssize_t taken = send(client, data + sent, size - sent, MSG_NOSIGNAL);
        if (taken >= 0) {
            sent += taken;
        } else {
            struct pollfd writable = {.fd = client, .events = POLLOUT};
            if (errno != EAGAIN || poll(&writable, 1, 1000) <= 0) return -1;
        }
    }
    return 0;
}

static void watch(int poller, int socket) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = socket};
    epoll_ctl(poller, EPOLL_CTL_ADD, socket, &event);
}

int main(void) {
    int listener = socket(AF_INET, SOCK_STREAM, 0), poller = epoll_create1(0), yes = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 512)) return 1;
    getsockname(listener, (struct sockaddr *)&address, &length);
    printf("listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
    watch(poller, listener);
    for (struct epoll_event events[256];;) {
        int ready = epoll_wait(poller, events, 256, -1);
        for (int each = 0; each < ready; each++) {
            int client = events[each].data.fd;
            if (client == listener) {
                client = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
                watch(poller, client);
                continue;
            }
            ssize_t size = recv(client, data, sizeof data, 0);
            if (size <= 0 || send_all(client, size)) close(client);
        }
    }
}
