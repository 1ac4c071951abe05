/* A minimal echo server on epoll, without framing or limits.
   Prints "listening on 127.0.0.1:PORT" and serves until it is killed. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static char data[1 << 18];
static struct { char *start; ssize_t sent, size; } unsent[1 << 20]; /* by descriptor; the client reads too slowly */

static void watch(int poller, int operation, int socket, int events) {
    struct epoll_event event = {.events = events, .data.fd = socket};
    epoll_ctl(poller, operation, socket, &event);
}

/* Sends what the client has not taken, or else receives and sends. Receives no more until all is sent. */
static int echo(int poller, int client) {
    char *rest = unsent[client].start, *start = rest ? rest + unsent[client].sent : data;
    ssize_t size = rest ? unsent[client].size - unsent[client].sent : recv(client, data, sizeof data, 0);
    if (size <= 0) return -1;
    ssize_t taken = send(client, start, size, MSG_NOSIGNAL);
    if (taken < 0 && errno != EAGAIN) return -1;
    if (taken < 0) taken = 0;
    if (rest) {
        unsent[client].sent += taken;
    } else if (taken < size) {
        unsent[client].start = memcpy(malloc(size - taken), data + taken, size - taken);
        unsent[client].sent = 0, unsent[client].size = size - taken;
        watch(poller, EPOLL_CTL_MOD, client, EPOLLOUT);
    }
    if (rest && taken == size) {
        free(rest), unsent[client].start = NULL;
        watch(poller, EPOLL_CTL_MOD, client, EPOLLIN);
    }
    return 0;
}

int main(void) {
    int listener = socket(AF_INET, SOCK_STREAM, 0), poller = epoll_create1(0), yes = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 512)) return 1;
    getsockname(listener, (struct sockaddr *)&address, &length);
    printf("listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
    watch(poller, EPOLL_CTL_ADD, listener, EPOLLIN);
    for (struct epoll_event events[256];;) {
        int ready = epoll_wait(poller, events, 256, -1);
        for (int each = 0; each < ready; each++) {
            int client = events[each].data.fd;
            if (client == listener) {
                client = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
                watch(poller, EPOLL_CTL_ADD, client, EPOLLIN);
            } else if (echo(poller, client)) {
                free(unsent[client].start), unsent[client].start = NULL;
                close(client);
            }
        }
    }
}
