// A minimal server on Go's net package: one goroutine per client, line by line. Replies are flushed when no
// input is buffered.
package main

import (
	"bufio"
	"fmt"
	"net"
)

func echo(client net.Conn) {
	defer client.Close()
	lines := bufio.NewReaderSize(client, 1<<16)
	replies := bufio.NewWriterSize(client, 1<<16)
	for {
		piece, err := lines.ReadSlice('\n')
		replies.Write(piece)
		if err == bufio.ErrBufferFull {
			continue
		}
		if err != nil {
			return
		}
		if lines.Buffered() == 0 {
			if replies.Flush() != nil {
				return
			}
		}
	}
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println("listening on", listener.Addr())
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		go echo(client)
	}
}
