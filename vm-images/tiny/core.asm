; The core of the tiny guest: one flat binary that runs at 0000:8000 in real mode, whoever loaded it.
; Its protocol is in README.md.
;
; It uses no BIOS call, no FPU, no SSE and no protected mode but the few instructions in
; interrupts.inc, so that it runs wherever QEMU does: under TCG, and under a /dev/kvm that cannot
; run a whole operating system.
;
; Conventions: a routine may change every register unless it says what it keeps; the carry flag set
; means failure. Interrupt handlers keep everything. Interrupts are on, except where they are off for
; a reason that is written there.

%include "layout.inc"

bits 16
org CORE_ADDRESS

core:
    cli
    cld
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, STACK_TOP
    mov di, variables                   ; a reset leaves RAM as it was
    mov cx, variables_end - variables
    rep stosb
    mov byte [sector], 1
    mov word [boot_name], text_rom
    cmp bl, BOOTED_FROM_DISK
    jne .from_rom
    mov word [boot_name], text_disk
.from_rom:
    call set_up_interrupts
    call set_up_serial
    call find_power_management
    call find_disk
    sti
    call introduce

; ---- The command loop ---------------------------------------------------------------------------

serve:
    call next_byte
    mov si, commands
.look:
    cmp byte [si], 0
    je .unknown
    cmp al, [si]
    je .found
    add si, 3
    jmp .look
.found:
    call [si + 1]
    jmp serve
.unknown:
    cmp al, '1'
    jb .no_digit
    cmp al, '9'
    ja .no_digit
    call choose_sector
    jmp serve
.no_digit:
    movzx eax, al
    mov si, text_unknown
    call say_with_number
    jmp serve

commands:                               ; letter, routine; a zero ends it
    db '?'
    dw introduce
    db 'e'
    dw echo_line
    db 'r'
    dw read_and_show
    db 'w'
    dw write_count
    db 't'
    dw show_ticks
    db 'T'
    dw toggle_timer
    db 's'
    dw spin
    db 'f'
    dw flood
    db 'h'
    dw hang
    db 'p'
    dw power_off_on_request
    db 'x'
    dw reset
    db 13                               ; a person at a console presses Enter
    dw nothing
    db 10
    dw nothing
    db 0

nothing:
    ret

; ---- Commands -----------------------------------------------------------------------------------

; `?` and the banner: one line that says what was found.
introduce:
    mov si, text_banner
    call say
    mov si, [boot_name]
    call say
    mov si, text_power
    call say
    mov si, [power_name]
    call say
    mov si, text_disk_is
    call say
    mov si, [disk_name]
    call say
    jmp end_line

; `e`: every byte as it comes, up to the end of the line, so that no line is too long.
echo_line:
    mov si, text_echo
    call say
.more:
    call next_byte
    cmp al, 13
    je end_line
    cmp al, 10
    je end_line
    call put_byte
    jmp .more

; `1` to `9`, in AL: the sector that `r` and `w` work on from now on. Sector 0 may be a boot sector.
choose_sector:
    sub al, '0'
    mov [sector], al
    mov si, text_sector
    call say
    call put_sector
    jmp end_line

; `r`: the sector's first 16 bytes, and the sum of its 256 words to prove that all of it came.
read_and_show:
    call [disk_read]
    jc say_disk_error
    mov si, text_read
    call say
    call put_sector
    mov al, ' '
    call put_byte
    mov si, SECTOR_BUFFER
    mov cx, RECORD_BYTES
.show:
    lodsb
    cmp al, ' '
    jb .unprintable
    cmp al, '~'
    jbe .printable
.unprintable:
    mov al, '.'
.printable:
    call put_byte
    loop .show
    xor ebx, ebx
    mov si, SECTOR_BUFFER
    mov cx, SECTOR_BYTES / 2
.add:
    lodsw
    add bx, ax
    loop .add
    mov eax, ebx
    mov si, text_sum
    jmp say_with_number

; `w`: the next count, as text, over the whole sector, and out to the disk's medium.
RECORD_BYTES        equ 16
write_count:
    inc dword [count]
    mov eax, [count]
    call spell_number
    mov di, SECTOR_BUFFER
    mov dx, SECTOR_BYTES / RECORD_BYTES
.record:
    mov si, text_record
    mov cx, RECORD_BYTES / 2
    rep movsb
    mov si, number_text
    mov cx, RECORD_BYTES / 2
    rep movsb
    dec dx
    jnz .record
    call [disk_write]
    jc say_disk_error
    mov si, text_wrote
    call say
    call put_sector
    mov al, ' '
    call put_byte
    mov si, number_text
    call say
    jmp end_line

; SI = what kind of error, as the disk's routine left it.
say_disk_error:
    push si
    mov si, text_error
    call say
    pop si
    call say
    jmp end_line

; `T`: let the timer interrupt 18.2 times a second, or let it be silent again.
toggle_timer:
    xor byte [timer_is_on], 1
    jnz .on
    call silence_timer
    jmp show_ticks
.on:
    call start_timer
; `t`: how often it did.
show_ticks:
    mov eax, [ticks]
    mov si, text_ticks
    jmp say_with_number

; `s`: all of one processor, without a single exit to QEMU, until a byte comes; that byte is the next
; command. The flag is cleared before the line is looked at: a byte that is there already raises no
; further interrupt, and one that comes later sets the flag.
spin:
    mov si, text_spin
    call say
    call end_line
    mov byte [line_has_stirred], 0
    xor ebx, ebx
    call byte_is_waiting
    jnz .end
.round:
    inc ebx
    cmp byte [button_is_pressed], 0
    jne power_off
    cmp byte [line_has_stirred], 0
    je .round
.end:
    mov eax, ebx
    mov si, text_spun
    jmp say_with_number

; `f`: lines without an end, until a byte comes; that byte is the next command.
flood:
    inc dword [flood_lines]
    mov eax, [flood_lines]
    mov si, text_flood
    call say_with_number
    cmp byte [button_is_pressed], 0
    jne power_off
    call byte_is_waiting
    jz flood
    ret

; `h`: deaf from now on, and idle: neither the serial line nor the power button wakes it.
hang:
    mov si, text_hang
    call say
    call end_line
    cli
.halt:
    hlt
    jmp .halt

%include "serial.inc"
%include "interrupts.inc"
%include "power.inc"
%include "disk.inc"

; ---- Texts --------------------------------------------------------------------------------------

text_banner:        db "KVMSEC-TINY up protocol=1 boot=", 0
text_power:         db " power=", 0
text_disk_is:       db " disk=", 0
text_rom:           db "rom", 0
text_disk:          db "disk", 0
text_none:          db "none", 0
text_piix4:         db "piix4", 0
text_ich9:          db "ich9", 0
text_ide:           db "ide", 0
text_virtio:        db "virtio", 0
text_echo:          db "ECHO ", 0
text_sector:        db "SECTOR ", 0
text_read:          db "READ ", 0
text_sum:           db " sum=", 0
text_wrote:         db "WROTE ", 0
text_record:        db "KVMSEC-W"
text_ticks:         db "TICKS ", 0
text_spin:          db "SPIN", 0
text_spun:          db "SPUN ", 0
text_flood:         db "FLOOD ", 0
text_hang:          db "HANG", 0
text_reset:         db "RESET", 0
text_power_off:     db "POWEROFF", 0
text_unknown:       db "UNKNOWN ", 0
text_error:         db "ERROR ", 0
text_no_disk:       db "no disk", 0
text_bad_disk:      db "disk failed", 0
text_no_power:      db "no power management", 0
text_fault:         db "FAULT", 0

core_end:

; ---- Variables ----------------------------------------------------------------------------------
; Behind the binary, not in it; cleared at the start.

absolute core_end
    alignb 4
variables:
count:              resd 1              ; `w` so far
flood_lines:        resd 1
ticks:              resd 1
boot_name:          resw 1
power_name:         resw 1
disk_name:          resw 1
disk_read:          resw 1              ; routines of the disk that was found
disk_write:         resw 1
ide_base:           resw 1              ; of its I/O ports
ide_drive:          resb 1              ; which of the channel's two, as the drive register wants it
sector:             resb 1              ; 1 to 9
timer_is_on:        resb 1
line_has_stirred:   resb 1              ; set by the serial line's interrupt
button_is_pressed:  resb 1              ; set by the power button's, or by `p`
number_text:        resb 9              ; eight digits and a zero
    alignb 4
virtio_header:                          ; as virtio-blk wants it: type, reserved, sector
virtio_type:        resd 1
                    resd 1
virtio_sector:      resd 2
virtio_features:    resd 1
virtio_base:        resw 1              ; of its I/O registers
virtio_available:   resw 1              ; address of the ring of requests
virtio_used:        resw 1              ; address of the ring of answers
virtio_status:      resb 1
variables_end:

%if core_end - core > 2048
    %error "the core is to stay below 2 KiB"
%endif
%if core_end - core + 4 + variables_end - variables > CORE_END - CORE_ADDRESS
    %error "the variables run into the virtio queue"
%endif
